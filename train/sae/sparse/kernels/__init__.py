"""Triton kernels of the sparse step, for a GPU or for Triton's interpreter: imported where they are needed.

Sums are taken in the tensors' own dtype (float32; float64 in tests), for any width, each by one program in a fixed
order: the same numbers from run to run. One file for each kernel, with the function that launches it.
"""
