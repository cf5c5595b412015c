"""The research bench: methods and peers compared. Nothing outside imports it but the command line.

It registers the start points that are there only to be compared with, so that recipes can name them.
"""

from cloq_export.recipe import register_choice

register_choice("init", "loftq", "cloq_export.lab.alternations:LOFTQ")
register_choice("init", "lq-lora", "cloq_export.lab.alternations:LQ_LORA")
register_choice("refine", "apiq-lw", "cloq_export.lab.apiq:LAYER_WISE")
register_choice("refine", "apiq-bw", "cloq_export.lab.apiq:BLOCK_WISE")
