"""`nearpeak inspect`: what compilers make of Triton kernels, read off the machine code of any target, without a GPU.

targets      what each architecture has, with sources         sass, amdgcn  instructions out of a disassembler's text
compiling    launches become compilations                     loops         the hottest loop
ours         our kernels at their shapes                      pipes         cycles of an iteration, by pipe
code         one compiled kernel: all of the above            occupancy     programs on a processor, and their limit
"""
