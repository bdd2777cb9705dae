//! Detached root file systems put together from layers: EROFS images and directories below an overlay.
