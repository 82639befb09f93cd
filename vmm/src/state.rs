//! Saved state of devices: what the guest can see of them, as documents that outlive a process and a release.
//!
//! Each device names the shape of its state ([`Stateful::KIND`], [`Stateful::VERSION`]) apart from its live fields. [`Saved`] is what the
//! buses demand of everything on them, so a device that cannot be saved does not compile. A newer release reads what an older one wrote
//! ([`Stateful::decode`]); what a newer one wrote is refused. Saved state comes from files and peers: it is checked like a guest's
//! writes, and never followed into a panic.
//!
//! Guest memory is none of it. Where a virtio device is in its rings is read from there: a stopped device has used every buffer that it
//! took, so that the index of its used ring says which one is next.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::bus::Bus;
use crate::pci::PciRoot;

/// Why state could not be saved or restored.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StateError {
    /// The vCPUs run, so the state changes while one looks.
    #[error("the guest is not paused")]
    NotPaused,
    /// The guest has ended.
    #[error("the guest has ended")]
    Ended,
    /// State of something else.
    #[error("{place}: state of {found:?} for {expected:?}")]
    Kind {
        /// Which device.
        place: String,
        /// Its kind.
        expected: &'static str,
        /// What the state is of.
        found: String,
    },
    /// Written by a newer release.
    #[error("{place}: state of version {found}, and this release reads up to {known}")]
    Version {
        /// Which device.
        place: String,
        /// What was found.
        found: u16,
        /// The newest one that is known.
        known: u16,
    },
    /// No state of that shape, or one that no device of this kind can have.
    #[error("{place}: {why}")]
    Invalid {
        /// Which device.
        place: String,
        /// What is wrong.
        why: String,
    },
    /// The machine has other devices than the one that was saved.
    #[error("the machines differ: {0} is on one side only")]
    Devices(String),
}

/// Why a device refuses a state, or has none to give now.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0}")]
pub(crate) struct Invalid(pub(crate) String);

impl Invalid {
    /// With this reason.
    pub(crate) fn because(why: impl std::fmt::Display) -> Self {
        Self(why.to_string())
    }
}

/// State of one device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    kind: String,
    version: u16,
    body: Vec<u8>,
}

/// State of all devices of a guest, by their places on the buses.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevicesState(BTreeMap<String, DeviceState>);

/// What becomes of a device of which a saved machine says nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unsaved {
    /// It is another machine.
    Refused,
    /// It stays as it was made: the machine was saved by a release that did not have such a device yet.
    AsNew,
}

/// A device whose guest-visible state has a shape of its own.
pub(crate) trait Stateful {
    /// Names the shape; never changes.
    const KIND: &'static str;
    /// Raised with each change of [`Stateful::State`].
    const VERSION: u16 = 1;
    /// What becomes of the device where nothing of it was saved.
    const UNSAVED: Unsaved = Unsaved::Refused;
    /// What is saved.
    type State: Serialize + DeserializeOwned;

    /// Reads a state of this version or an older one. A device whose shape has changed overrides it and converts.
    fn decode(_version: u16, body: &[u8]) -> Result<Self::State, Invalid> {
        postcard::from_bytes(body).map_err(Invalid::because)
    }

    /// The state now.
    fn capture(&self) -> Result<Self::State, Invalid>;

    /// Takes a state over. Checked before anything changes; what is refused leaves the device as it was.
    fn adopt(&self, state: Self::State) -> Result<(), Invalid>;

    /// Keeps away from the guest's memory until [`Stateful::release`], for those devices that ever touch it by themselves. When this
    /// returns, all that was under way is done.
    fn hold(&self) {}

    /// Goes on, or begins with what it has taken over meanwhile.
    fn release(&self) -> Result<(), Invalid> {
        Ok(())
    }
}

/// What the buses demand of devices; every [`Stateful`] one has it.
pub(crate) trait Saved {
    /// The state now, to be restored at the same `place` of another machine.
    fn save(&self, place: &str) -> Result<DeviceState, StateError>;
    /// Takes over what was saved.
    fn restore(&self, place: &str, state: &DeviceState) -> Result<(), StateError>;
    /// [`Stateful::UNSAVED`].
    fn unsaved(&self) -> Unsaved;
    /// [`Stateful::hold`].
    fn keep_away(&self);
    /// [`Stateful::release`].
    fn go_on(&self, place: &str) -> Result<(), StateError>;
}

impl<T: Stateful> Saved for T {
    fn save(&self, place: &str) -> Result<DeviceState, StateError> {
        let invalid = |why: String| StateError::Invalid { place: place.to_owned(), why };
        let state = self.capture().map_err(|error| invalid(error.0))?;
        let body = postcard::to_stdvec(&state).map_err(|error| invalid(error.to_string()))?;
        Ok(DeviceState { kind: T::KIND.to_owned(), version: T::VERSION, body })
    }

    fn restore(&self, place: &str, state: &DeviceState) -> Result<(), StateError> {
        if state.kind != T::KIND {
            let found = state.kind.clone();
            return Err(StateError::Kind { place: place.to_owned(), expected: T::KIND, found });
        }
        if state.version > T::VERSION {
            let (found, known) = (state.version, T::VERSION);
            return Err(StateError::Version { place: place.to_owned(), found, known });
        }
        let adopted = T::decode(state.version, &state.body).and_then(|state| self.adopt(state));
        adopted.map_err(|error| StateError::Invalid { place: place.to_owned(), why: error.0 })
    }

    fn unsaved(&self) -> Unsaved {
        T::UNSAVED
    }

    fn keep_away(&self) {
        self.hold();
    }

    fn go_on(&self, place: &str) -> Result<(), StateError> {
        self.release().map_err(|error| StateError::Invalid { place: place.to_owned(), why: error.0 })
    }
}

/// All devices of a guest, as long as it has them.
pub(crate) struct Devices {
    pub(crate) ports: Weak<Bus>,
    pub(crate) mmio: Weak<Bus>,
    pub(crate) pci: Weak<PciRoot>,
}

impl Devices {
    /// Saves all devices. No vCPU runs.
    pub(crate) fn save(&self) -> Result<DevicesState, StateError> {
        let mut saved = BTreeMap::new();
        self.visit(|place, device| {
            saved.insert(place.to_owned(), device.save(place)?);
            Ok(())
        })?;
        Ok(DevicesState(saved))
    }

    /// Restores all devices. No vCPU runs. After an error some devices have the new state and some the old one: the guest must not go on.
    pub(crate) fn restore(&self, saved: &DevicesState) -> Result<(), StateError> {
        let mut left: BTreeMap<_, _> = saved.0.iter().collect();
        self.visit(|place, device| match (left.remove(&place.to_owned()), device.unsaved()) {
            (Some(state), _) => device.restore(place, state),
            (None, Unsaved::AsNew) => Ok(()),
            (None, Unsaved::Refused) => Err(StateError::Devices(place.to_owned())),
        })?;
        match left.into_keys().next() {
            Some(place) => Err(StateError::Devices(place.clone())),
            None => self.pci.upgrade().map(|pci| pci.find_windows()).ok_or(StateError::Ended),
        }
    }

    /// Has all devices keep away from the guest's memory.
    pub(crate) fn hold(&self) -> Result<(), StateError> {
        self.visit(|_, device| {
            device.keep_away();
            Ok(())
        })
    }

    /// Lets them go on. Those that were not held do not notice.
    pub(crate) fn release(&self) -> Result<(), StateError> {
        self.visit(|place, device| device.go_on(place))
    }

    fn visit(
        &self,
        mut visit: impl FnMut(&str, &dyn Saved) -> Result<(), StateError>,
    ) -> Result<(), StateError> {
        let gone = || StateError::Ended;
        let ports: Arc<Bus> = self.ports.upgrade().ok_or_else(gone)?;
        let mmio: Arc<Bus> = self.mmio.upgrade().ok_or_else(gone)?;
        let pci: Arc<PciRoot> = self.pci.upgrade().ok_or_else(gone)?;
        for (address, device) in ports.devices() {
            visit(&format!("port {address:#x}"), device)?;
        }
        for (address, device) in mmio.devices() {
            visit(&format!("memory {address:#x}"), device)?;
        }
        for (slot, device) in pci.devices() {
            visit(&format!("pci 00:{slot:02x}.0"), device.as_ref())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
