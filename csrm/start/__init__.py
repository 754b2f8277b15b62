"""A first configuration for the tables of a company: how their columns are called, what they hold, which recipe fits.

Read tables, columns, languages and grades; then recipes, proposal, files and summary. Nothing needs Spark or torch.
The commands may import it. It imports scoring (the labels), artefacts and ground files.
"""
