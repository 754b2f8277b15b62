"""After the night: review a rejected run, roll back, maintain, evaluate, report.

Read review, rollback, maintenance and evaluation; then findings, history and report (with report.html).
The commands may import it. It imports night, retrieval and the platform (spark), never torch.
"""
