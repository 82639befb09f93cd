//! Ports: where guests' network interfaces plug in, each a vhost-user-net device that a VMM connects to.
//!
//! | module | it is |
//! |---|---|
//! | [`features`] | what the device offers and a guest takes |
//! | [`vring`] | a ring as the vhost-user crate sees it, with the kick kept from its threads |
//! | [`ring`] | frames out of and into a guest's ring |
//! | [`backend`] | the vhost-user side: features, configuration space, rings that start |
//! | [`listener`] | the socket, and the thread that serves it |
//! | [`device`] | a port as the switch sees it: deliver a frame, take a frame |
//!
//! A VMM may come and go at any time; a port without one drops what is for it. What a guest puts into its rings is
//! hostile: a chain that makes no sense is given back and counted, and the ring goes on.

pub(crate) mod backend;
pub(crate) mod device;
pub(crate) mod features;
pub(crate) mod listener;
pub(crate) mod ring;
pub(crate) mod vring;
