"""Proving on a given model, machine and text that every way of running is the same and that the plan is the allocation."""

from kvshare.doctor.examination import examine
from kvshare.doctor.report import Check, Report

__all__ = ["Check", "Report", "examine"]
