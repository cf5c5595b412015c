"""What `verify` measures, piece by piece: options, plan, engines, float model, reference, engine, verdict."""
