"""The platform: Spark, Delta tables and Hadoop's file system.

Read session, jars, storage, tables, commits, migration, inputs and catalogs; then workers, progress, text and scoring.
The rooms retrieval, night, operations and doctor and the commands may import it. It never imports torch.
"""
