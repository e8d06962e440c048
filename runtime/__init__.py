"""Running what was compiled: loading, training, generating, converting, and the command line."""
