"""Whether a night could run here, before it starts.

Read checks (what a check is), machine (this machine), then cluster (every executor).
The commands may import it. It imports night's settings, the bundle and the platform (spark).
"""
