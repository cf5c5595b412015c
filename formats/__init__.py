"""On-disk layouts, one folder each: its SPEC.md, its codec and its golden bytes."""
