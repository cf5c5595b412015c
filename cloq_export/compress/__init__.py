"""From a float model to codes, scales, zeros and adapters: plan, walk over the blocks, solve, refine, budget."""
