"""Exact arithmetic in few passes over memory: functions of tensors, which know nothing else."""
