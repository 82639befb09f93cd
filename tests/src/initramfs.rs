//! An initramfs with a few programs and modules: what a machine runs that has nothing but memory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::guest::{file_name, find, fresh, install, install_busybox, output, run};

/// An initramfs in the making: a folder that is packed at the end.
#[derive(Debug)]
pub struct Initramfs {
    root: PathBuf,
}

impl Initramfs {
    /// Begins with BusyBox and empty mount points.
    pub fn new(root: &Path) -> Result<Self> {
        let root = fresh(root)?;
        install_busybox(&root)?;
        for name in ["dev", "proc", "sys", "run", "tmp", "mnt", "data", "sbin", "modules", "var/run"] {
            fs::create_dir_all(root.join(name))?;
        }
        Ok(Self { root })
    }

    /// Adds a program to `/bin`, and the libraries that it is linked with.
    pub fn program(&self, path: &Path) -> Result<()> {
        install(path, &self.root.join("bin").join(file_name(path)))?;
        let libraries = output(Command::new("ldd").arg(path))?;
        for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
            let target = self.root.join(library.trim_start_matches('/'));
            fs::create_dir_all(target.parent().context("a library in no folder")?)?;
            install(Path::new(library), &target)?;
        }
        Ok(())
    }

    /// Adds a module of the kernel that was unpacked there to `/modules`.
    pub fn module(&self, kernel: &Path, name: &str) -> Result<()> {
        let file = format!("{name}.ko");
        let found = find(&kernel.join("lib/modules"), &|path| file_name(path) == file)?
            .pop()
            .with_context(|| format!("the kernel package holds no module {file}"))?;
        install(&found, &self.root.join("modules").join(file))
    }

    /// Adds a file.
    pub fn file(&self, from: &Path, to: &str) -> Result<()> {
        install(from, &self.root.join(to))
    }

    /// Packs it all.
    pub fn pack(self, to: &Path) -> Result<()> {
        run(Command::new("sh")
            .arg("-c")
            .arg("find . -print0 | sort -z | cpio --null --quiet -o -H newc -R 0:0 | gzip -n -1 > \"$1\"")
            .arg("sh")
            .arg(std::path::absolute(to)?)
            .current_dir(&self.root))
    }
}
