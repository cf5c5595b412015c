"""The verbs: one file for each, `def verb(what, options) -> Result`; `options` alone needs no torch."""
