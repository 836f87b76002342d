"""The benchmark behind `scripts/bench`.

cases.py       what is measured, and the times to reach
operators.py   each operator: its inputs, who computes it, what is a wrong result
timing.py      microseconds on the GPU and on the host
peers.py       the libraries to compare with
report.py      tables for the terminal and for the README
plot.py        time over the number of ids
"""
