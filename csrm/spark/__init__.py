"""The parts of CSRM that run on Spark: session, tables, inputs, pairs, scoring, publishing."""
