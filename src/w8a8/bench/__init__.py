"""Benchmarks of this tool against its peers: in the same run, by turns, medians. One file per `w8a8 bench` command.

They share `model` (Gemma 4 31B's sizes), `contest` (turns in one process), `process` (whole processes) and `peers`.
`gemm` also has `contenders` and `tuning`; `compiled` has `targets` and `assembly`; `vllm_kernel` serves both.
"""
