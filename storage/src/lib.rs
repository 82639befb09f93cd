//! See the design: this crate's page is written with its first module.
