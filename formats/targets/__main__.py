"""`python -m cloq_export.formats.targets --into docs/targets.md` renders the table into its page again."""

from cloq_export.formats.targets.page import main

main()
