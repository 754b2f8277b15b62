"""HTML pages that need nothing beside them, and the plots in them.

Read page (with page.html), then plots. Every room that writes a report may import it. It imports ground files only.
"""
