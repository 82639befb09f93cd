//! Several nodes in one process, over real sockets and disks.
