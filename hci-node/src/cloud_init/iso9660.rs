//! A minimal writer of ISO 9660: a few files in the root directory, with their long names for Linux (Rock Ridge) and for
//! everybody else (Joliet).
//!
//! The image is the same for the same files: all dates are unset. Sectors, in order: 16 without meaning, the descriptors, a path
//! table in both byte orders for each of the two trees, the two root directories, the files.

/// A sector.
const SECTOR: usize = 2048;
/// Sectors in front of the first descriptor.
const SYSTEM_AREA: u32 = 16;
const PRIMARY: u32 = SYSTEM_AREA;
const JOLIET: u32 = PRIMARY + 1;
const TERMINATOR: u32 = JOLIET + 1;
/// The path tables: little-endian and big-endian for the primary tree, then for Joliet's.
const PATH_TABLES: u32 = TERMINATOR + 1;
const PRIMARY_ROOT: u32 = PATH_TABLES + 4;
const JOLIET_ROOT: u32 = PRIMARY_ROOT + 1;
const FILES: u32 = JOLIET_ROOT + 1;
/// A path table with the root only.
const PATH_TABLE_BYTES: u32 = 10;
/// Marks a directory record of a directory.
const DIRECTORY: u8 = 2;
/// POSIX modes that Rock Ridge tells.
const MODE_DIRECTORY: u32 = 0o040_555;
const MODE_FILE: u32 = 0o100_444;

/// A file of the root directory. Files are given in the order of their short names.
#[derive(Clone, Copy, Debug)]
pub(super) struct File<'a> {
    /// Its name.
    pub(super) name: &'a str,
    /// Its name for readers that know neither extension: up to eight of `A-Z`, `0-9` and `_`.
    pub(super) short_name: &'a str,
    /// What it holds.
    pub(super) content: &'a [u8],
}

/// The names of a tree and what its records carry besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tree {
    /// Short names, with Rock Ridge.
    Primary,
    /// UCS-2.
    Joliet,
}

impl Tree {
    fn text(self, text: &str) -> Vec<u8> {
        match self {
            Self::Primary => text.as_bytes().to_vec(),
            Self::Joliet => text.encode_utf16().flat_map(u16::to_be_bytes).collect(),
        }
    }

    /// A text field, filled up with blanks.
    fn padded(self, text: &str, len: usize) -> Vec<u8> {
        let mut field = self.text(text);
        let blank = self.text(" ");
        while field.len() + blank.len() <= len {
            field.extend_from_slice(&blank);
        }
        field.resize(len, 0);
        field
    }

    fn root(self) -> u32 {
        match self {
            Self::Primary => PRIMARY_ROOT,
            Self::Joliet => JOLIET_ROOT,
        }
    }

    /// Where its little-endian path table is; the other one follows.
    fn path_table(self) -> u32 {
        match self {
            Self::Primary => PATH_TABLES,
            Self::Joliet => PATH_TABLES + 2,
        }
    }
}

/// The image of a disk with this label and these files.
pub(super) fn image(label: &str, files: &[File<'_>]) -> Vec<u8> {
    let mut next = FILES;
    let places: Vec<u32> = files
        .iter()
        .map(|file| {
            let at = next;
            next += file.content.len().div_ceil(SECTOR) as u32;
            at
        })
        .collect();
    let mut image = Image(vec![0; next as usize * SECTOR]);
    for tree in [Tree::Primary, Tree::Joliet] {
        image.put(if tree == Tree::Primary { PRIMARY } else { JOLIET }, &descriptor(tree, label, next));
        image.put(tree.path_table(), &path_table(tree.root().to_le_bytes(), 1u16.to_le_bytes()));
        image.put(tree.path_table() + 1, &path_table(tree.root().to_be_bytes(), 1u16.to_be_bytes()));
        image.put(tree.root(), &directory(tree, files, &places));
    }
    image.put(TERMINATOR, b"\xffCD001\x01");
    for (file, at) in files.iter().zip(&places) {
        image.put(*at, file.content);
    }
    image.0
}

struct Image(Vec<u8>);

impl Image {
    fn put(&mut self, sector: u32, bytes: &[u8]) {
        let at = sector as usize * SECTOR;
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

/// A number in both byte orders, as the format likes it.
fn both32(value: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&value.to_le_bytes());
    bytes[4..].copy_from_slice(&value.to_be_bytes());
    bytes
}

fn both16(value: u16) -> [u8; 4] {
    let ([a, b], [c, d]) = (value.to_le_bytes(), value.to_be_bytes());
    [a, b, c, d]
}

fn descriptor(tree: Tree, label: &str, sectors: u32) -> Vec<u8> {
    let mut out = Vec::with_capacity(SECTOR);
    out.push(if tree == Tree::Primary { 1 } else { 2 });
    out.extend(b"CD001\x01\0");
    out.extend(tree.padded("LINUX", 32));
    out.extend(tree.padded(label, 32));
    out.extend([0; 8]);
    out.extend(both32(sectors));
    let mut escapes = [0; 32];
    if tree == Tree::Joliet {
        // UCS-2 level 3.
        escapes[..3].copy_from_slice(b"%/E");
    }
    out.extend(escapes);
    out.extend(both16(1)); // volumes in the set
    out.extend(both16(1)); // which of them
    out.extend(both16(SECTOR as u16));
    out.extend(both32(PATH_TABLE_BYTES));
    out.extend(tree.path_table().to_le_bytes());
    out.extend([0; 4]);
    out.extend((tree.path_table() + 1).to_be_bytes());
    out.extend([0; 4]);
    out.extend(record(&Entry::directory(tree.root(), 0, &[])));
    // Set, publisher, preparer, application.
    for _ in 0..4 {
        out.extend(tree.padded("", 128));
    }
    // Copyright, abstract and bibliography files.
    for _ in 0..3 {
        out.extend(tree.padded("", 37));
    }
    // Created, modified, expires, effective: unset.
    for _ in 0..4 {
        out.extend([b'0'; 16]);
        out.push(0);
    }
    out.push(1); // version of the structures
    out
}

fn path_table(root: [u8; 4], parent: [u8; 2]) -> Vec<u8> {
    let mut out = vec![1, 0];
    out.extend(root);
    out.extend(parent);
    out.extend([0, 0]);
    out
}

/// A directory record to be.
struct Entry<'a> {
    at: u32,
    length: u32,
    flags: u8,
    identifier: &'a [u8],
    system_use: &'a [u8],
}

impl<'a> Entry<'a> {
    /// The root (`identifier` 0) or its parent (1), which is itself.
    fn directory(at: u32, identifier: u8, system_use: &'a [u8]) -> Self {
        let identifier: &[u8] = if identifier == 0 { &[0] } else { &[1] };
        Self { at, length: SECTOR as u32, flags: DIRECTORY, identifier, system_use }
    }
}

fn record(entry: &Entry<'_>) -> Vec<u8> {
    let mut out = vec![0, 0];
    out.extend(both32(entry.at));
    out.extend(both32(entry.length));
    out.extend([0; 7]); // date: unset
    out.extend([entry.flags, 0, 0]);
    out.extend(both16(1));
    out.push(entry.identifier.len() as u8);
    out.extend(entry.identifier);
    if out.len() % 2 == 1 {
        out.push(0);
    }
    out.extend(entry.system_use);
    out.resize(out.len().next_multiple_of(2), 0);
    out[0] = out.len() as u8;
    out
}

/// The root directory. It fits in a sector for the few files there are.
fn directory(tree: Tree, files: &[File<'_>], places: &[u32]) -> Vec<u8> {
    let (own_use, parent_use) = match tree {
        Tree::Primary => {
            let mut own = susp(b"SP", &[0xbe, 0xef, 0]);
            own.extend(posix(MODE_DIRECTORY, 2));
            own.extend(extensions());
            (own, posix(MODE_DIRECTORY, 2))
        }
        Tree::Joliet => (Vec::new(), Vec::new()),
    };
    let mut out = record(&Entry::directory(tree.root(), 0, &own_use));
    out.extend(record(&Entry::directory(tree.root(), 1, &parent_use)));
    for (file, at) in files.iter().zip(places) {
        let (identifier, system_use) = match tree {
            Tree::Primary => {
                let mut name = vec![0];
                name.extend(file.name.as_bytes());
                let mut system_use = posix(MODE_FILE, 1);
                system_use.extend(susp(b"NM", &name));
                (format!("{}.;1", file.short_name).into_bytes(), system_use)
            }
            Tree::Joliet => (tree.text(file.name), Vec::new()),
        };
        let length = file.content.len() as u32;
        out.extend(record(&Entry {
            at: *at,
            length,
            flags: 0,
            identifier: &identifier,
            system_use: &system_use,
        }));
    }
    out
}

/// An entry of the System Use Sharing Protocol, version 1.
fn susp(signature: &[u8; 2], data: &[u8]) -> Vec<u8> {
    let mut out = signature.to_vec();
    out.extend([data.len() as u8 + 4, 1]);
    out.extend(data);
    out
}

/// Rock Ridge's `PX`: mode, links, owner and group.
fn posix(mode: u32, links: u32) -> Vec<u8> {
    let data: Vec<u8> = [mode, links, 0, 0].into_iter().flat_map(both32).collect();
    susp(b"PX", &data)
}

/// `ER`: says that Rock Ridge is used, without the prose about it.
fn extensions() -> Vec<u8> {
    let id = b"RRIP_1991A";
    let mut data = vec![id.len() as u8, 0, 0, 1];
    data.extend(id);
    susp(b"ER", &data)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    fn files<'a>(meta: &'a [u8], user: &'a [u8]) -> [File<'a>; 2] {
        [
            File { name: "meta-data", short_name: "META_DAT", content: meta },
            File { name: "user-data", short_name: "USER_DAT", content: user },
        ]
    }

    /// What a tool that reads such disks prints; none where it is not installed.
    fn tool(name: &str, arguments: &[&str]) -> Option<Vec<u8>> {
        match Command::new(name).args(arguments).output() {
            Ok(output) => {
                assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
                Some(output.stdout)
            }
            Err(error) => {
                eprintln!("SKIPPED: {name}: {error}");
                None
            }
        }
    }

    #[test]
    fn others_read_the_files_under_both_kinds_of_names() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("seed.iso");
        let user = vec![b'u'; 5000];
        std::fs::write(&path, image("CIDATA", &files(b"meta", &user))).unwrap();
        let path = path.to_str().unwrap();
        for names in ["-R", "-J"] {
            if let Some(listed) = tool("isoinfo", &["-i", path, names, "-f"]) {
                assert_eq!(String::from_utf8_lossy(&listed), "/meta-data\n/user-data\n", "{names}");
            }
            if let Some(content) = tool("isoinfo", &["-i", path, names, "-x", "/user-data"]) {
                assert_eq!(content, user, "{names}");
            }
            if let Some(content) = tool("isoinfo", &["-i", path, names, "-x", "/meta-data"]) {
                assert_eq!(content, b"meta", "{names}");
            }
        }
        if let Some(known) = tool("blkid", &["-p", "-o", "export", path]) {
            let known = String::from_utf8_lossy(&known).into_owned();
            assert!(known.contains("TYPE=iso9660\n") && known.contains("LABEL=CIDATA\n"), "{known}");
        }
    }

    proptest! {
        #[test]
        fn records_lead_to_the_content(meta in prop::collection::vec(any::<u8>(), 0..5000), user in prop::collection::vec(any::<u8>(), 0..5000)) {
            let image = image("CIDATA", &files(&meta, &user));
            prop_assert_eq!(image.len() % SECTOR, 0);
            for (root, contents) in [(PRIMARY_ROOT, [&meta, &user]), (JOLIET_ROOT, [&meta, &user])] {
                let mut at = root as usize * SECTOR;
                let mut found = Vec::new();
                while image[at] != 0 {
                    let number = |from: usize| u32::from_le_bytes(image[at + from..at + from + 4].try_into().unwrap());
                    let start = number(2) as usize * SECTOR;
                    if image[at + 25] & DIRECTORY == 0 {
                        found.push(image[start..start + number(10) as usize].to_vec());
                    }
                    at += usize::from(image[at]);
                }
                prop_assert!(at <= (root as usize + 1) * SECTOR);
                prop_assert_eq!(found, contents.map(Clone::clone).to_vec());
            }
        }
    }
}
