//! Netlink sockets: requests, acknowledgements, dumps and atomic batches.
