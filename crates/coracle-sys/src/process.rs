//! Processes: clone3, pidfds, namespaces, roles of our own binary, credentials.
