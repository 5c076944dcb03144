#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <tuple>
#include <vector>

#include "address.h"
#include "program.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace kvshare;

void bind_program(nb::module_& m) {
    // From start to stop it times what the kernels do that this thread calls. `laps`: seconds and calls of products, attention, small operations.
    nb::class_<Stopwatch>(m, "Stopwatch")
        .def(nb::init<>())
        .def("start",
             [](Stopwatch& self) {
                 if (stopwatch) throw std::logic_error("this thread has a stopwatch that runs");
                 stopwatch = &self;
             })
        .def("stop", [](Stopwatch&) { stopwatch = nullptr; })
        .def_prop_ro("laps", [](const Stopwatch& self) {
            std::vector<std::tuple<double, int64_t>> laps;
            for (const auto& lap : self.laps) laps.emplace_back(lap.seconds, lap.calls);
            return laps;
        });

    m.def("records", [] { return recording != nullptr; });
    m.def("not_recorded", [](const char* what) { not_recorded(what); });
    // While a thread records, its calls run as ever. `spans` and `count` are a step's, as in every call that is told of one.
    nb::class_<Program>(m, "Program")
        .def("__init__", [](Program* self, uintptr_t spans, int64_t count) { new (self) Program({at<const StepSpan>(spans), count}); }, "spans"_a, "count"_a)
        .def("begin",
             [](Program& self) {
                 if (recording) throw std::logic_error("this thread records already");
                 recording = &self;
             })
        .def("end", [](Program& self) {
            if (recording != &self) throw std::logic_error("this thread does not record this program");
            recording = nullptr;
        })
        .def_prop_ro("refusal", &Program::refusal)
        .def("__len__", &Program::size)
        .def("run",
             [](const Program& self, int64_t begin, int64_t end, uintptr_t spans, int64_t count) {
                 if (begin < 0 || end > self.size()) throw std::out_of_range("calls that were not recorded");
                 nb::gil_scoped_release released;
                 self.run(begin, end, {at<const StepSpan>(spans), count});
             }, "begin"_a, "end"_a, "spans"_a, "count"_a);
}
