"""After the night: review a rejected run, roll back, maintain, evaluate, report.

Read review, rollback, maintenance; then findings, texts, history, report (with report.html) and run_metrics;
evaluation and evaluation_page; comparison and comparison_page; then launch_answers, live_queries, launch_findings,
launch and launch_report: a market that is to be opened.
The commands may import it. It imports scoring, night, retrieval and the platform (spark), never torch.
"""
