"""One night: plan, score, canary, audit, publish.

Read settings, context, run (the five steps), then plan, chunks, outcome, audit, publish, published, runs, leases and
messages.
Operations, doctor, capacity and the commands may import it. It never imports torch.
"""
