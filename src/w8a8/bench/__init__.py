"""Benchmarks: this tool against its peers in the same run, interleaved, medians. One file per `w8a8 bench` command."""
