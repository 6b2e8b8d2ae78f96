"""Which strategy, and why: the bills of all of them, and a decision tree over the bills.

python -m refkl_lib.advisor Qwen/Qwen2.5-7B --gpus 8 --memory 80
"""
