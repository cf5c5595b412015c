"""Triton kernels for GPUs: packed linears, dequantization, and the inner loops of calibration and quantization.

Nothing here is imported before the first tensor on a GPU asks for it, so machines without Triton work too:
`kernels.dispatch` decides whether these kernels compute, and otherwise torch does. The kernels that decide bytes on
disk (`gram`, `optq`, `grid`, `prox`) have one fixed shape each, so that the same inputs give the same bytes; those of
`linear` and `dequantize` are tuned on the machine that they run on, once, and the choice is kept in Triton's cache
folder.

A kernel takes pointers and numbers one by one, so it has as many parameters as it needs; the functions that launch
them take objects.
"""
