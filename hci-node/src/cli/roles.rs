//! The entry points of the node's roles: what the system starts, and the installer on the ISO.
