"""Export of trained models to bundles: needs optimum (`pip install csrm[export]`)."""
