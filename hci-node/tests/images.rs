//! The image worker as it is run: real images, compared with what `qemu-img` makes of them; damaged images; a worker
//! that is killed; a download that breaks off.
//!
//! Needs `qemu-img` (Debian: qemu-utils).

// The lint knows test functions, not their helpers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::{
    fs::{self, File},
    io::Write,
    path::Path,
    process::Command,
    sync::{Arc, Mutex},
    time::Duration,
};

use support::{MIB, Server, disk, qemu_img, sum};

use hci_node::images::{
    download::{Download, DownloadError},
    protocol::{Extent, Format, Mode},
    reader::{ReadError, Worker},
};

fn worker() -> Worker {
    Worker { program: env!("CARGO_BIN_EXE_hci").into(), patience: Duration::from_secs(30) }
}

/// What the worker says the disk holds, from an offset on, and how much of it came as data.
async fn read(path: &Path, from: u64) -> Result<(Format, Vec<u8>, usize), ReadError> {
    let mut reading = worker().open(File::open(path).unwrap(), Mode::Read, from).await?;
    let header = reading.header()?;
    let mut content = vec![0; (header.size_bytes - from) as usize];
    let mut sent = 0;
    while let Some(extent) = reading.next().await? {
        if let Extent::Data { offset, data } = extent {
            let start = (offset - from) as usize;
            content[start..start + data.len()].copy_from_slice(&data);
            sent += data.len();
        }
    }
    Ok((header.format, content, sent))
}

/// The disk as `qemu-img` reads it, padded to a block.
fn expected(image: &Path, format: &str) -> Vec<u8> {
    let raw = image.with_extension("expected");
    qemu_img(&["convert", "-f", format, "-O", "raw", image.to_str().unwrap(), raw.to_str().unwrap()]);
    let mut bytes = fs::read(raw).unwrap();
    bytes.resize(bytes.len().next_multiple_of(4096), 0);
    bytes
}

#[tokio::test]
async fn every_format_reads_as_qemu_img_reads_it() {
    let dir = tempfile::tempdir().unwrap();
    let raw = disk(dir.path());
    let cases: &[(&str, Format, &[&str])] = &[
        ("raw", Format::Raw, &[]),
        ("qcow2", Format::Qcow2, &["-o", "compat=0.10"]),
        ("qcow2", Format::Qcow2, &["-o", "compat=1.1"]),
        ("qcow2", Format::Qcow2, &["-c", "-o", "compat=1.1"]),
        ("qcow2", Format::Qcow2, &["-c", "-o", "compat=0.10,cluster_size=4096"]),
        ("qcow2", Format::Qcow2, &["-o", "cluster_size=512"]),
        ("qcow2", Format::Qcow2, &["-o", "cluster_size=2097152"]),
        ("qcow2", Format::Qcow2, &["-o", "preallocation=metadata"]),
        ("vmdk", Format::Vmdk, &["-o", "subformat=monolithicSparse"]),
        ("vmdk", Format::Vmdk, &["-o", "subformat=streamOptimized"]),
    ];
    for (number, (name, format, options)) in cases.iter().enumerate() {
        let image = dir.path().join(format!("image-{number}"));
        let (from, to) = (raw.to_str().unwrap(), image.to_str().unwrap());
        qemu_img(&[&["convert", "-f", "raw", "-O", name], *options, &[from, to]].concat());
        let (found, content, sent) = read(&image, 0).await.unwrap();
        assert_eq!(found, *format, "{name} {options:?}");
        assert!(content == expected(&image, name), "{name} {options:?} differs");
        assert!(sent < 2 * MIB, "{name} {options:?}: {sent} bytes were sent of a disk that is mostly empty");
        let (_, tail, _) = read(&image, 3 * MIB as u64).await.unwrap();
        assert!(tail == content[3 * MIB..], "{name} {options:?} differs when read from the middle");
        let (header, present) = worker().probe(File::open(&image).unwrap()).await.unwrap();
        assert_eq!(header.size_bytes, content.len() as u64, "{name} {options:?}");
        assert!(present >= sent as u64 && present < 12 * MIB as u64, "{name} {options:?}: {present}");
    }
}

#[tokio::test]
async fn images_that_need_other_files_or_are_cut_off_are_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let raw = disk(dir.path());
    let path = |name: &str| dir.path().join(name);
    let base = path("base.qcow2");
    qemu_img(&["convert", "-O", "qcow2", raw.to_str().unwrap(), base.to_str().unwrap()]);
    let create = |name: &str, options: &[&str]| {
        let image = path(name);
        let to = image.to_str().unwrap().to_owned();
        qemu_img(&[&["create", "-q"], options, &[&to, "8M"]].concat());
        image
    };
    let external = format!("data_file={}", path("external").display());
    let cut = path("cut.qcow2");
    let whole = fs::read(&base).unwrap();
    File::create(&cut).unwrap().write_all(&whole[..whole.len() / 2]).unwrap();
    let gzip = path("disk.gz");
    fs::write(&gzip, b"\x1f\x8b\x08 and so on").unwrap();
    let empty = path("empty");
    fs::write(&empty, b"").unwrap();
    let cases = [
        (
            create("child.qcow2", &["-f", "qcow2", "-b", base.to_str().unwrap(), "-F", "qcow2"]),
            "a backing file",
        ),
        (create("external.qcow2", &["-f", "qcow2", "-o", &external]), "an external data file"),
        (create("extended.qcow2", &["-f", "qcow2", "-o", "extended_l2=on"]), "extended entries"),
        (
            create("zstd.qcow2", &["-f", "qcow2", "-o", "compression_type=zstd"]),
            "another compression than zlib",
        ),
        (create("flat.vmdk", &["-f", "vmdk", "-o", "subformat=monolithicFlat"]), "in other files"),
        (create("split.vmdk", &["-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse"]), "in other files"),
        (create("disk.vhdx", &["-f", "vhdx"]), "VHDX"),
        (create("disk.vdi", &["-f", "vdi"]), "VDI"),
        (cut, "truncated or corrupt"),
        (gzip, "compressed with gzip"),
        (empty, "a disk of 0 bytes"),
    ];
    for (image, reason) in cases {
        let refused = worker().probe(File::open(&image).unwrap()).await.unwrap_err();
        let ReadError::Image(text) = &refused else { panic!("{}: {refused}", image.display()) };
        assert!(text.contains(reason), "{}: {text}", image.display());
    }
}

#[tokio::test]
async fn damaged_images_harm_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let raw = disk(dir.path());
    let mut state = 0x5eed_u64;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let formats: &[&[&str]] =
        &[&["qcow2"], &["qcow2", "-c"], &["vmdk"], &["vmdk", "-o", "subformat=streamOptimized"]];
    let (mut refused, mut read_through) = (0, 0);
    for (number, format) in formats.iter().enumerate() {
        let image = dir.path().join(format!("image-{number}"));
        let (from, to) = (raw.to_str().unwrap(), image.to_str().unwrap());
        qemu_img(&[&["convert", "-f", "raw", "-O"], *format, &[from, to]].concat());
        let whole = fs::read(&image).unwrap();
        for round in 0..50 {
            let mut bytes = whole.clone();
            for _ in 0..1 + random(4) {
                // Mostly the tables, which are at the front.
                let range = if round % 2 == 0 { 512 } else { bytes.len() };
                let at = random(range);
                bytes[at] ^= 1 << random(8);
            }
            if round % 7 == 0 {
                bytes.truncate(random(bytes.len()));
            }
            fs::write(&image, &bytes).unwrap();
            let ended = tokio::time::timeout(Duration::from_secs(60), walk(&image)).await;
            match ended.unwrap_or_else(|_| panic!("{format:?} {round} hangs")) {
                Ok(()) => read_through += 1,
                Err(_) => refused += 1,
            }
        }
    }
    assert!(refused > 20, "{refused} of 200 damaged images were refused");
    assert!(read_through > 20, "{read_through} of 200 damaged images were read");
}

/// Reads an image without keeping it; a damaged header may claim a large disk, of which the start is enough.
async fn walk(image: &Path) -> Result<(), ReadError> {
    let mut reading = worker().open(File::open(image).unwrap(), Mode::Read, 0).await?;
    while let Some(extent) = reading.next().await? {
        if extent.end() > 64 << 30 {
            break;
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_worker_that_dies_or_says_nothing_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("large");
    // More than fits into the pipe, so that the worker cannot be ready before it is killed.
    fs::write(&path, vec![1; 64 * MIB]).unwrap();
    let mut reading = worker().open(File::open(&path).unwrap(), Mode::Read, 0).await.unwrap();
    let process = reading.process().unwrap();
    assert!(reading.next().await.unwrap().is_some());
    assert!(Command::new("kill").args(["-9", &process.to_string()]).status().unwrap().success());
    let died = loop {
        match reading.next().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("a killed worker looked complete"),
            Err(error) => break error,
        }
    };
    assert!(matches!(&died, ReadError::Died(how) if how.contains("killed")), "{died}");

    let says = |script: &str| {
        let program = dir.path().join("worker.sh");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        Worker { program, patience: Duration::from_secs(1) }
    };
    let image = || File::open(&path).unwrap();
    let silent = says("exec /bin/sleep 60").open(image(), Mode::Read, 0).await.unwrap_err();
    assert!(matches!(silent, ReadError::Silent(_)), "{silent}");
    let garbage =
        says("echo this is not a frame of any kind").open(image(), Mode::Read, 0).await.unwrap_err();
    assert!(matches!(garbage, ReadError::Garbage(_)), "{garbage}");
    let words = says("echo 'out of luck' >&2; exit 3").open(image(), Mode::Read, 0).await.unwrap_err();
    assert!(matches!(&words, ReadError::Died(how) if how == "exit code 3: out of luck"), "{words}");
}

#[tokio::test]
async fn the_worker_has_no_privileges() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("large");
    fs::write(&path, vec![1; 64 * MIB]).unwrap();
    let mut reading = worker().open(File::open(&path).unwrap(), Mode::Read, 0).await.unwrap();
    assert!(reading.next().await.unwrap().is_some());
    // It is stuck in the pipe now, in its sandbox.
    let process = reading.process().unwrap();
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().skip(1).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(field("NoNewPrivs:"), ["1"]);
    assert_eq!(field("Seccomp:"), ["2"]);
    assert_eq!(field("Threads:"), ["1"]);
    if field("Uid:")[0] == "0" || nix::unistd::geteuid().is_root() {
        assert!(field("Uid:").iter().all(|id| id == "64720"), "{status}");
        assert!(field("Gid:").iter().all(|id| id == "64720"), "{status}");
        assert!(field("Groups:").is_empty(), "{status}");
        let network = fs::read_to_string(format!("/proc/{process}/net/dev")).unwrap();
        assert_eq!(network.lines().count(), 3, "only lo: {network}");
        let descriptors = fs::read_dir(format!("/proc/{process}/fd")).unwrap().count();
        assert_eq!(descriptors, 5);
    }
    for set in ["CapPrm:", "CapEff:", "CapInh:", "CapAmb:"] {
        assert_eq!(field(set), ["0000000000000000"], "{set}");
    }
}

#[tokio::test]
async fn a_download_goes_on_where_it_broke_off() {
    let dir = tempfile::tempdir().unwrap();
    let bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n / 7) as u8).collect();
    let content = Arc::new(Mutex::new(("\"one\"".to_owned(), bytes.clone())));
    let server = Server::start(content.clone(), 1_000_000);
    let download = |path: &str, file: &str| Download {
        url: server.url(path),
        to: dir.path().join(file),
        limit: 1 << 30,
        sha256: Some(sum(&bytes)),
    };
    let mut told = Vec::new();
    let file = download("/moved", "file");
    assert_eq!(file.run(|there, total| told.push((there, total))).await.unwrap(), 3_000_000);
    assert!(fs::read(dir.path().join("file")).unwrap() == bytes);
    let requests = server.requests.lock().unwrap().clone();
    let ranges: Vec<_> = requests.iter().filter(|line| line.starts_with("GET /file")).cloned().collect();
    assert_eq!(
        ranges,
        ["GET /file HTTP/1.1 ", "GET /file HTTP/1.1 bytes=1000000-", "GET /file HTTP/1.1 bytes=2000000-"]
    );
    // As after a restart: it is whole, and nothing of it comes again.
    assert_eq!(file.run(|_, _| ()).await.unwrap(), 3_000_000);
    assert!(server.requests.lock().unwrap().last().unwrap().ends_with("bytes=3000000-"));

    // Another version in the middle is got from its start.
    let other: Vec<u8> = bytes.iter().rev().copied().collect();
    fs::write(dir.path().join("changed"), &bytes[..500_000]).unwrap();
    let origin = format!(r#"{{"url":"{}","validator":"\"one\""}}"#, server.url("/file"));
    fs::write(dir.path().join("changed.source"), origin).unwrap();
    *content.lock().unwrap() = ("\"two\"".to_owned(), other.clone());
    let changed = Download { sha256: None, ..download("/file", "changed") };
    assert_eq!(changed.run(|_, _| ()).await.unwrap(), 3_000_000);
    assert!(fs::read(dir.path().join("changed")).unwrap() == other);

    // What is not what it should be is not kept.
    let wrong = download("/file", "wrong").run(|_, _| ()).await.unwrap_err();
    assert!(matches!(wrong, DownloadError::Sum { .. }), "{wrong}");
    assert!(!dir.path().join("wrong").exists());
    let none = download("/none", "none").run(|_, _| ()).await.unwrap_err();
    assert!(matches!(none, DownloadError::Refused { .. }), "{none}");
    let begun = std::time::Instant::now();
    let circle = download("/circle", "circle").run(|_, _| ()).await.unwrap_err();
    assert!(matches!(&circle, DownloadError::Url(why) if why.contains("redirects")), "{circle}");
    assert!(begun.elapsed() < Duration::from_secs(10), "it was not tried again and again");
    let large = Download { limit: 1000, ..download("/file", "large") }.run(|_, _| ()).await.unwrap_err();
    assert!(matches!(large, DownloadError::TooLarge(1000)), "{large}");
}
