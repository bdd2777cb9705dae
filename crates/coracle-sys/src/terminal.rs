//! Terminals: pseudo-terminal pairs, raw mode, window sizes.
