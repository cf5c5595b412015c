"""What a quantized checkpoint of any origin is, and what is suspicious about it.

Labels can be wrong: files of GPTQ version 2 are published as version 1, and codes in another bit order have the same
shapes. So the content is examined too, by headers and by a sample of layers and rows; the result is evidence, and is
reported with its figures.
"""

from cloq_export.artifact.detective.case import Suspicion
from cloq_export.artifact.detective.examination import Examination, examine

__all__ = ["Examination", "Suspicion", "examine"]
