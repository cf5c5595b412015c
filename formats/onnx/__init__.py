"""ONNX decoder graphs with our integers in them, and adapters that switch at run time; see SPEC.md.

Only `graph`, `reading` and `adapter` need the packages of the extra `onnx`.
"""
