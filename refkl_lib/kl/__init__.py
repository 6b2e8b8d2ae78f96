"""What is computed: the KL between two models, exactly or from samples."""
