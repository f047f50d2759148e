"""What can be chosen of finetuning, known without torch: a command refuses the rest at once."""

STAGES = ("temporal", "sensitive")
PRECISIONS = ("float32", "bf16")
DEVICES = ("cpu", "cuda")
