"""Problems and demonstrations to Parquet with Ray Data, and back as training batches."""
