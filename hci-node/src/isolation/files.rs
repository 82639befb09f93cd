//! Landlock: what may be done with which files, no TCP port, no abstract socket, no signal to others; as far as the kernel knows these.

use std::{io, path::PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

/// The newest Landlock that we know; older kernels enforce what they know of it.
const LANDLOCK: ABI = ABI::V6;

/// What may be done with a file, or with what is in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Read it.
    Read,
    /// Read it and write to it. It has to be there: this makes no file.
    Write,
    /// Read and write to a device, with its requests.
    Device,
    /// Read what is in the directory, make sockets in it, remove what is its own.
    Sockets,
}

impl Use {
    fn access(self) -> BitFlags<AccessFs> {
        match self {
            Self::Read => AccessFs::ReadFile.into(),
            Self::Write => AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate,
            Self::Device => AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev,
            Self::Sockets => AccessFs::ReadFile | AccessFs::MakeSock | AccessFs::RemoveFile,
        }
    }
}

/// How much of the rules the kernel enforces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enforced {
    /// All.
    Fully,
    /// What it knows.
    Partly,
    /// Nothing: it has no Landlock.
    Not,
}

/// Leaves these uses of files and refuses all others, for good.
pub fn leave(uses: &[(PathBuf, Use)]) -> io::Result<Enforced> {
    let restrict = || -> Result<_, RulesetError> {
        let mut rules = Ruleset::default()
            .handle_access(AccessFs::from_all(LANDLOCK))?
            .handle_access(AccessNet::from_all(LANDLOCK))?
            .scope(Scope::from_all(LANDLOCK))?
            .create()?;
        for (path, usage) in uses {
            if let Ok(file) = PathFd::new(path) {
                rules = rules.add_rule(PathBeneath::new(file, usage.access()))?;
            }
        }
        rules.restrict_self()
    };
    let status = restrict().map_err(io::Error::other)?;
    Ok(match status.ruleset {
        RulesetStatus::FullyEnforced => Enforced::Fully,
        RulesetStatus::PartiallyEnforced => Enforced::Partly,
        RulesetStatus::NotEnforced => Enforced::Not,
    })
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::net::UnixListener, process::Command};

    use super::*;

    /// Holds for a thread and what it starts; the rest of the test goes on as before.
    fn in_thread<T: Send + 'static>(inside: impl FnOnce() -> T + Send + 'static) -> T {
        std::thread::spawn(inside).join().unwrap()
    }

    fn denied<T>(outcome: io::Result<T>) -> bool {
        outcome.err().is_some_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
    }

    #[test]
    fn without_a_use_no_file_is_left() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (path, dir) = (file.path().to_owned(), file.path().with_file_name("never"));
        let result = in_thread(move || {
            leave(&[]).unwrap();
            (
                denied(fs::File::open(&path)),
                denied(fs::create_dir(&dir)),
                denied(fs::remove_file(&path)),
                denied(Command::new("/bin/true").status()),
            )
        });
        assert_eq!(result, (true, true, true, true));
        assert!(file.path().exists());
    }

    #[test]
    fn a_directory_for_sockets_is_for_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let (at, kept) = (dir.path().to_owned(), dir.path().join("kept"));
        fs::write(&kept, "old").unwrap();
        let outcome = in_thread(move || {
            leave(&[(at.clone(), Use::Sockets), (kept.clone(), Use::Write)]).unwrap();
            (
                UnixListener::bind(at.join("socket")).is_ok(),
                fs::write(&kept, "new").is_ok(),
                denied(fs::write(at.join("new"), "")),
                denied(std::os::unix::fs::symlink("/etc/shadow", at.join("link"))),
                denied(fs::create_dir(at.join("dir"))),
            )
        });
        assert_eq!(outcome, (true, true, true, true, true));
    }
}
