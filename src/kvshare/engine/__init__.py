"""From requests to tokens: sequences, the scheduler, the runner, the sampler, and the `LLM` class around them."""
