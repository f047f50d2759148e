"""QuEST's selective finetuning (arXiv 2402.03666)."""
