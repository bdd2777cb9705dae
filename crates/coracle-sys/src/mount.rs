//! The new mount API with its fall-backs, and path resolution that cannot leave a root.
