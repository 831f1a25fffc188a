"""The same model in other engines, and in ours: speed and accuracy side by side, in one run (tools/benchmark.py --against).

environment  each peer's own virtual environment, from its lock file
candidates   what runs: engines of ours and of peers, each made from one fp32 folder
engines/     the scripts that run inside those environments; they share `worker.py` and import nothing of ours
race         rows, turns, figures
roofline     operations of the model against this CPU's measured INT8 peak
report       the table and the figure
"""
