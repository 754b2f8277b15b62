"""HTML pages that need nothing beside them, and the plots in them.

Read page (with page.html), then plots.
The rooms operations and training, which write reports, may import it. It imports ground files only.
"""
