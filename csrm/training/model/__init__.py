"""The language model that judges relevance.

Read base (loading one), families and weight_files (which ones can be), attention (over packs), relevance (logits of
labels), then tiny (for tests and the demo).
Training, export and the commands may import it.
"""
