//! The HTTP API: its JSON resources, its errors, and the server.

pub mod problem;
pub mod types;
