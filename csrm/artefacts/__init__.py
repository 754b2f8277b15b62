"""What all artefacts share: trained models, bundles and encoders, each a folder with a manifest.

Read manifest (a folder is whole and unchanged), cache (a folder from far away), then tracking (MLflow).
Every room that reads or writes an artefact may import it. It imports ground files only.
"""
