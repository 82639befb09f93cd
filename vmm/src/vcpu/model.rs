//! CPU models: which of its processor's features a guest is shown.
//!
//! `host` shows all that KVM has. The others show exactly the features of a microarchitecture level (x86-64 psABI, section 3.1.1), and of those around it what
//! every server processor of that level has, so that a guest finds the same wherever it starts. A node that lacks one of them cannot run such a
//! guest: it is told so before it starts, by [`Missing`].
//!
//! What is shown as it is, because it is no promise: the processor's vendor, family and name, its caches, the width of its addresses, and the
//! bits that tell a kernel how to mitigate flaws of the very processor it runs on.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};

use crate::error::{VmError, kvm};

/// Which features a guest is shown. In order: each level has those of the ones before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum CpuModel {
    /// x86-64-v2: SSE4.2, POPCNT, CMPXCHG16B. All servers since about 2009.
    #[serde(rename = "x86-64-v2")]
    X86_64V2,
    /// x86-64-v3: AVX2, BMI, FMA, and AES. Since about 2015.
    #[serde(rename = "x86-64-v3")]
    X86_64V3,
    /// x86-64-v4: AVX-512. Intel since 2017, AMD since 2022.
    #[serde(rename = "x86-64-v4")]
    X86_64V4,
    /// All that the node has: fastest, and different from node to node.
    #[default]
    #[serde(rename = "host")]
    Host,
}

use CpuModel::{Host, X86_64V2, X86_64V3, X86_64V4};

impl CpuModel {
    /// All of them.
    pub const ALL: [Self; 4] = [X86_64V2, X86_64V3, X86_64V4, Host];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            X86_64V2 => "x86-64-v2",
            X86_64V3 => "x86-64-v3",
            X86_64V4 => "x86-64-v4",
            Host => "host",
        }
    }

    /// The models that KVM on this machine can show.
    ///
    /// # Errors
    /// KVM cannot be opened or asked.
    pub fn supported() -> Result<BTreeSet<Self>, VmError> {
        let system = Kvm::new().map_err(kvm("open /dev/kvm"))?;
        let cpuid =
            system.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm("KVM_GET_SUPPORTED_CPUID"))?;
        Ok(Self::ALL.into_iter().filter(|model| model.missing(&cpuid).is_ok()).collect())
    }

    /// Whether all of its features are there.
    fn missing(self, supported: &CpuId) -> Result<(), Missing> {
        let lacks =
            |feature: &&Feature| self.has(feature) && feature.at.of(supported) >> feature.bit & 1 == 0;
        let features: Vec<_> = FEATURES.iter().filter(lacks).map(|feature| feature.name).collect();
        if features.is_empty() { Ok(()) } else { Err(Missing { model: self, features }) }
    }

    fn has(self, feature: &Feature) -> bool {
        self != Host && feature.since <= self
    }

    fn bits(self, at: Register) -> u32 {
        let bits = FEATURES.iter().filter(|feature| feature.at == at && self.has(feature));
        bits.fold(0, |bits, feature| bits | 1 << feature.bit)
    }

    /// What of KVM's leaves a guest is shown.
    ///
    /// # Errors
    /// The features that are not there.
    pub(crate) fn shape(self, supported: &CpuId) -> Result<CpuId, Missing> {
        self.missing(supported)?;
        let mut shown = supported.clone();
        if self != Host {
            let area = self.save_area(supported);
            shown.as_mut_slice().iter_mut().for_each(|entry| self.cut(entry, area));
        }
        Ok(shown)
    }

    fn cut(self, entry: &mut kvm_cpuid_entry2, save_area: u32) {
        let kept = match (entry.function, entry.index) {
            (0, _) => return entry.eax = entry.eax.min(LAST_LEAF),
            (0x8000_0000, _) => return entry.eax = entry.eax.min(LAST_EXTENDED_LEAF),
            (1, _) => [!0, !0, self.bits(Register::Leaf1Ecx) | KVM_ECX, self.bits(Register::Leaf1Edx)],
            // Caches, topology, names, widths of addresses, and what KVM says of itself.
            (2 | 4 | 0xb | 0x8000_0002..=0x8000_0006 | 0x8000_001d | 0x8000_001e, _) => return,
            (0x4000_0000..=0x4fff_ffff, _) => return,
            (6, _) => [ALWAYS_RUNNING_APIC_TIMER, 0, 0, 0],
            (7, 0) => [0, self.bits(Register::Leaf7Ebx), 0, MITIGATIONS_EDX],
            (0xd, 0) if save_area > 0 => {
                (entry.ebx, entry.ecx) = (LEGACY_AREA, save_area);
                [self.state_components(), !0, !0, 0]
            }
            (0xd, 2..32) if self.state_components() >> entry.index & 1 == 1 => return,
            (0x8000_0001, _) => {
                let edx = self.bits(Register::ExtendedEdx) | AMD_COPY & self.bits(Register::Leaf1Edx);
                [!0, !0, self.bits(Register::ExtendedEcx) | KVM_EXTENDED_ECX, edx]
            }
            (0x8000_0007, _) => [0, 0, 0, INVARIANT_TSC],
            (0x8000_0008, _) => [!0, MITIGATIONS_EBX, !0, 0],
            _ => [0; 4],
        };
        entry.eax &= kept[0];
        entry.ebx &= kept[1];
        entry.ecx &= kept[2];
        entry.edx &= kept[3];
    }

    /// The parts of a processor's state that XSAVE knows of, as bits of XCR0.
    fn state_components(self) -> u32 {
        match self {
            X86_64V2 => 0,
            X86_64V3 => 0b111,
            X86_64V4 => 0b1110_0111,
            Host => !0,
        }
    }

    /// Bytes of the XSAVE area with all of them, in the standard form: the end of the last one.
    fn save_area(self, supported: &CpuId) -> u32 {
        if self.state_components() == 0 {
            return 0;
        }
        let parts = supported.as_slice().iter().filter(|entry| {
            entry.function == 0xd
                && (2..32).contains(&entry.index)
                && self.state_components() >> entry.index & 1 == 1
        });
        parts.map(|part| part.eax.saturating_add(part.ebx)).max().unwrap_or(0).max(LEGACY_AREA)
    }
}

/// Registers whose bits are features: leaf, index, and which of EAX, EBX, ECX and EDX.
const FEATURE_REGISTERS: [(u32, u32, usize); 14] = [
    (1, 0, 2),
    (1, 0, 3),
    (7, 0, 1),
    (7, 0, 2),
    (7, 0, 3),
    (7, 1, 0),
    (0xd, 0, 0),
    (0xd, 1, 0),
    (0x4000_0001, 0, 0),
    (0x8000_0001, 0, 2),
    (0x8000_0001, 0, 3),
    (0x8000_0007, 0, 3),
    (0x8000_0008, 0, 1),
    (0x8000_000a, 0, 3),
];

/// A machine's processor, as far as it matters to a guest that is saved on one machine and goes on on another.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Processor {
    /// Who made it.
    pub vendor: String,
    /// Of all features that KVM can show of it: the same value, the same features.
    pub features: u64,
}

impl Processor {
    /// This machine's.
    ///
    /// # Errors
    /// KVM cannot be opened or asked.
    pub fn of_host() -> Result<Self, VmError> {
        let system = Kvm::new().map_err(kvm("open /dev/kvm"))?;
        let cpuid =
            system.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm("KVM_GET_SUPPORTED_CPUID"))?;
        Ok(Self::of(&cpuid))
    }

    fn of(cpuid: &CpuId) -> Self {
        let [_, b, c, d] = registers(cpuid, 0, 0);
        let name: Vec<u8> = [b, d, c].into_iter().flat_map(u32::to_le_bytes).collect();
        let vendor = name.into_iter().filter(u8::is_ascii_graphic).map(char::from).collect();
        // FNV-1a: it need not withstand anybody, only be the same everywhere and in all releases.
        let bits = FEATURE_REGISTERS
            .iter()
            .flat_map(|(leaf, index, at)| registers(cpuid, *leaf, *index)[*at].to_le_bytes());
        let features = bits.fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        });
        Self { vendor, features }
    }

    /// Whether a guest of that model that ran on `saved` may go on here: a named model has the same features everywhere but for
    /// the vendor's own, `host` has those of its machine. The guest's own leaves are compared when it is made.
    pub fn carries(&self, saved: &Self, model: CpuModel) -> bool {
        self.vendor == saved.vendor && (model != Host || self.features == saved.features)
    }
}

fn registers(cpuid: &CpuId, leaf: u32, index: u32) -> [u32; 4] {
    let entry = cpuid.as_slice().iter().find(|entry| (entry.function, entry.index) == (leaf, index));
    entry.map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
}

/// Whether a guest that has been shown `saved` can go on where it would be shown `own`: by the same vendor, with all its features and address bits.
///
/// # Errors
/// What is missing, as a sentence.
pub(crate) fn check_fit(saved: &CpuId, own: &CpuId) -> Result<(), String> {
    let vendor = |cpuid: &CpuId| registers(cpuid, 0, 0)[1..].to_vec();
    if vendor(saved) != vendor(own) {
        return Err("this node's processor is of another vendor".to_owned());
    }
    for (leaf, index, register) in FEATURE_REGISTERS {
        let missing = registers(saved, leaf, index)[register] & !registers(own, leaf, index)[register];
        if missing != 0 {
            let register = ["EAX", "EBX", "ECX", "EDX"][register];
            return Err(format!(
                "this node's processor lacks features that it was shown: bits {missing:#x} of {register} in leaf {leaf:#x}.{index}"
            ));
        }
    }
    let width = |cpuid: &CpuId| registers(cpuid, 0x8000_0008, 0)[0] & 0xff;
    if width(saved) > width(own) {
        return Err(format!(
            "this node's processor has {} address bits instead of {}",
            width(own),
            width(saved)
        ));
    }
    Ok(())
}

impl fmt::Display for CpuModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The text names no model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no CPU model; there are x86-64-v2, x86-64-v3, x86-64-v4 and host")]
pub struct ParseModelError(String);

impl FromStr for CpuModel {
    type Err = ParseModelError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|model| model.name() == text)
            .ok_or_else(|| ParseModelError(text.to_owned()))
    }
}

/// This machine cannot show a model's features.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("CPU model {model} needs {}, which this node lacks", features.join(", "))]
pub struct Missing {
    /// The model.
    pub model: CpuModel,
    /// The features that are not there.
    pub features: Vec<&'static str>,
}

/// Highest leaf that the models have anything in, and the extended one.
const LAST_LEAF: u32 = 0xd;
const LAST_EXTENDED_LEAF: u32 = 0x8000_001e;
/// Leaf 1 ECX, of KVM's own making: x2APIC, TSC deadline timer, OSXSAVE (follows CR4), hypervisor.
const KVM_ECX: u32 = 1 << 21 | 1 << 24 | 1 << 27 | 1 << 31;
/// Leaf 0x8000_0001 ECX, of the topology: legacy multi-processing, extended APIC ids, core and node numbers.
const KVM_EXTENDED_ECX: u32 = 1 << 1 | 1 << 3 | 1 << 22;
/// Leaf 6 EAX.
const ALWAYS_RUNNING_APIC_TIMER: u32 = 1 << 2;
/// Leaf 7 EDX: MD_CLEAR, SPEC_CTRL, STIBP, L1D_FLUSH, ARCH_CAPABILITIES, SSBD.
const MITIGATIONS_EDX: u32 = 1 << 10 | 0b11 << 26 | 1 << 28 | 1 << 29 | 1 << 31;
/// Leaf 0x8000_0008 EBX: IBPB, IBRS, STIBP, always-on STIBP, SSBD, virtual SSBD, SSB_NO.
const MITIGATIONS_EBX: u32 = 1 << 12 | 1 << 14 | 1 << 15 | 1 << 17 | 0b111 << 24;
/// Leaf 0x8000_0007 EDX.
const INVARIANT_TSC: u32 = 1 << 8;
/// Leaf 0x8000_0001 EDX: where AMD repeats leaf 1.
const AMD_COPY: u32 = 0x0183_f3ff;
/// Bytes of an XSAVE area with x87 and SSE only, which is what is enabled at reset.
const LEGACY_AREA: u32 = 576;

/// A register that has features.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Register {
    Leaf1Ecx,
    Leaf1Edx,
    Leaf7Ebx,
    ExtendedEcx,
    ExtendedEdx,
}

impl Register {
    fn of(self, cpuid: &CpuId) -> u32 {
        let function = match self {
            Self::Leaf1Ecx | Self::Leaf1Edx => 1,
            Self::Leaf7Ebx => 7,
            Self::ExtendedEcx | Self::ExtendedEdx => 0x8000_0001,
        };
        let entry = cpuid.as_slice().iter().find(|entry| (entry.function, entry.index) == (function, 0));
        entry.map_or(0, |entry| match self {
            Self::Leaf1Ecx | Self::ExtendedEcx => entry.ecx,
            Self::Leaf1Edx | Self::ExtendedEdx => entry.edx,
            Self::Leaf7Ebx => entry.ebx,
        })
    }
}

/// A feature, and the first level that has it.
struct Feature {
    name: &'static str,
    at: Register,
    bit: u32,
    since: CpuModel,
}

const fn feature(since: CpuModel, at: Register, bit: u32, name: &'static str) -> Feature {
    Feature { name, at, bit, since }
}

/// All that the levels show. HTT and the like follow from the topology and are set elsewhere.
const FEATURES: [Feature; 60] = [
    feature(X86_64V2, Register::Leaf1Edx, 0, "FPU"),
    feature(X86_64V2, Register::Leaf1Edx, 1, "VME"),
    feature(X86_64V2, Register::Leaf1Edx, 2, "DE"),
    feature(X86_64V2, Register::Leaf1Edx, 3, "PSE"),
    feature(X86_64V2, Register::Leaf1Edx, 4, "TSC"),
    feature(X86_64V2, Register::Leaf1Edx, 5, "MSR"),
    feature(X86_64V2, Register::Leaf1Edx, 6, "PAE"),
    feature(X86_64V2, Register::Leaf1Edx, 7, "MCE"),
    feature(X86_64V2, Register::Leaf1Edx, 8, "CX8"),
    feature(X86_64V2, Register::Leaf1Edx, 9, "APIC"),
    feature(X86_64V2, Register::Leaf1Edx, 11, "SEP"),
    feature(X86_64V2, Register::Leaf1Edx, 12, "MTRR"),
    feature(X86_64V2, Register::Leaf1Edx, 13, "PGE"),
    feature(X86_64V2, Register::Leaf1Edx, 14, "MCA"),
    feature(X86_64V2, Register::Leaf1Edx, 15, "CMOV"),
    feature(X86_64V2, Register::Leaf1Edx, 16, "PAT"),
    feature(X86_64V2, Register::Leaf1Edx, 17, "PSE36"),
    feature(X86_64V2, Register::Leaf1Edx, 19, "CLFLUSH"),
    feature(X86_64V2, Register::Leaf1Edx, 23, "MMX"),
    feature(X86_64V2, Register::Leaf1Edx, 24, "FXSR"),
    feature(X86_64V2, Register::Leaf1Edx, 25, "SSE"),
    feature(X86_64V2, Register::Leaf1Edx, 26, "SSE2"),
    feature(X86_64V2, Register::ExtendedEdx, 11, "SYSCALL"),
    feature(X86_64V2, Register::ExtendedEdx, 20, "NX"),
    feature(X86_64V2, Register::ExtendedEdx, 29, "LM"),
    feature(X86_64V2, Register::ExtendedEcx, 0, "LAHF"),
    feature(X86_64V2, Register::Leaf1Ecx, 0, "SSE3"),
    feature(X86_64V2, Register::Leaf1Ecx, 9, "SSSE3"),
    feature(X86_64V2, Register::Leaf1Ecx, 13, "CMPXCHG16B"),
    feature(X86_64V2, Register::Leaf1Ecx, 19, "SSE4.1"),
    feature(X86_64V2, Register::Leaf1Ecx, 20, "SSE4.2"),
    feature(X86_64V2, Register::Leaf1Ecx, 23, "POPCNT"),
    feature(X86_64V3, Register::Leaf1Ecx, 1, "PCLMULQDQ"),
    feature(X86_64V3, Register::Leaf1Ecx, 12, "FMA"),
    feature(X86_64V3, Register::Leaf1Ecx, 22, "MOVBE"),
    feature(X86_64V3, Register::Leaf1Ecx, 25, "AES"),
    feature(X86_64V3, Register::Leaf1Ecx, 26, "XSAVE"),
    feature(X86_64V3, Register::Leaf1Ecx, 28, "AVX"),
    feature(X86_64V3, Register::Leaf1Ecx, 29, "F16C"),
    feature(X86_64V3, Register::Leaf1Ecx, 30, "RDRAND"),
    feature(X86_64V3, Register::Leaf7Ebx, 0, "FSGSBASE"),
    feature(X86_64V3, Register::Leaf7Ebx, 3, "BMI1"),
    feature(X86_64V3, Register::Leaf7Ebx, 5, "AVX2"),
    feature(X86_64V3, Register::Leaf7Ebx, 7, "SMEP"),
    feature(X86_64V3, Register::Leaf7Ebx, 8, "BMI2"),
    feature(X86_64V3, Register::Leaf7Ebx, 9, "ERMS"),
    feature(X86_64V3, Register::Leaf7Ebx, 18, "RDSEED"),
    feature(X86_64V3, Register::Leaf7Ebx, 19, "ADX"),
    feature(X86_64V3, Register::Leaf7Ebx, 20, "SMAP"),
    feature(X86_64V3, Register::ExtendedEcx, 5, "LZCNT"),
    feature(X86_64V3, Register::ExtendedEcx, 8, "PREFETCHW"),
    feature(X86_64V3, Register::ExtendedEdx, 26, "1 GiB pages"),
    feature(X86_64V3, Register::ExtendedEdx, 27, "RDTSCP"),
    feature(X86_64V4, Register::Leaf7Ebx, 16, "AVX512F"),
    feature(X86_64V4, Register::Leaf7Ebx, 17, "AVX512DQ"),
    feature(X86_64V4, Register::Leaf7Ebx, 23, "CLFLUSHOPT"),
    feature(X86_64V4, Register::Leaf7Ebx, 24, "CLWB"),
    feature(X86_64V4, Register::Leaf7Ebx, 28, "AVX512CD"),
    feature(X86_64V4, Register::Leaf7Ebx, 30, "AVX512BW"),
    feature(X86_64V4, Register::Leaf7Ebx, 31, "AVX512VL"),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    /// A processor that has everything, a name, AVX-512 and more state than that.
    fn rich() -> Vec<kvm_cpuid_entry2> {
        let all = [u32::MAX; 4];
        let mut leaves: Vec<_> =
            [0, 1, 2, 4, 5, 6, 7, 0xa, 0xb, 0x12, 0x14, 0x8000_0000, 0x8000_0001, 0x8000_0002, 0x8000_0007]
                .map(|function| leaf(function, 0, all))
                .into();
        leaves.push(leaf(7, 1, all));
        leaves.push(leaf(0xd, 0, [0x602e7, 2696, 11008, 0]));
        leaves.push(leaf(0xd, 1, all));
        for (index, size, offset) in
            [(2, 256, 576), (5, 64, 1088), (6, 512, 1152), (7, 1024, 1664), (9, 8, 2688)]
        {
            leaves.push(leaf(0xd, index, [size, offset, 0, 0]));
        }
        leaves
    }

    fn shown(model: CpuModel) -> Vec<kvm_cpuid_entry2> {
        model.shape(&CpuId::from_entries(&rich()).unwrap()).unwrap().as_slice().to_vec()
    }

    fn find(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> [u32; 4] {
        let leaf = leaves.iter().find(|leaf| (leaf.function, leaf.index) == (function, index)).unwrap();
        [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
    }

    #[test]
    fn a_level_shows_its_features_and_no_others() {
        let v2 = shown(X86_64V2);
        assert_eq!(find(&v2, 7, 0), [0, 0, 0, MITIGATIONS_EDX]);
        assert_eq!(find(&v2, 0xd, 0), [0; 4]);
        assert_eq!(find(&v2, 1, 0)[2] & 1 << 28, 0, "AVX");
        let v3 = shown(X86_64V3);
        assert_eq!(find(&v3, 7, 0)[1] & 1 << 5, 1 << 5, "AVX2");
        assert_eq!(find(&v3, 7, 0)[1] & 1 << 16, 0, "AVX512F");
        assert_eq!(find(&v3, 0xd, 0), [7, 576, 832, 0]);
        assert_eq!(find(&v3, 0xd, 5), [0; 4]);
        let v4 = shown(X86_64V4);
        assert_eq!(find(&v4, 0xd, 0), [0xe7, 576, 2688, 0]);
        assert_eq!(find(&v4, 0xd, 9), [0; 4], "protection keys are beyond the level");
        for leaves in [v2, v3, v4] {
            for gone in [5, 0xa, 0x12, 0x14] {
                assert_eq!(find(&leaves, gone, 0), [0; 4]);
            }
            assert_eq!(find(&leaves, 7, 1), [0; 4]);
            assert_eq!(find(&leaves, 2, 0), [u32::MAX; 4]);
            assert_eq!(find(&leaves, 0, 0)[0], LAST_LEAF);
        }
    }

    #[test]
    fn host_shows_all() {
        assert_eq!(shown(Host), rich());
    }

    #[test]
    fn two_processors_look_the_same_where_both_have_a_level() {
        let mut poor = rich();
        // Without AVX-512 and what came with it.
        poor.iter_mut().filter(|leaf| leaf.function == 7).for_each(|leaf| leaf.ebx &= 0xffff);
        poor.iter_mut()
            .filter(|leaf| leaf.function == 7 && leaf.index == 0)
            .for_each(|leaf| leaf.ebx |= 7 << 18);
        poor.retain(|leaf| leaf.function != 0xd || leaf.index <= 2);
        let poor = CpuId::from_entries(&poor).unwrap();
        let there = |cpuid: &[kvm_cpuid_entry2]| {
            let some = cpuid.iter().filter(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx] != [0; 4]);
            some.copied().collect::<Vec<_>>()
        };
        let shaped = X86_64V3.shape(&poor).unwrap();
        assert_eq!(there(shaped.as_slice()), there(&shown(X86_64V3)));
        let missing = X86_64V4.shape(&poor).unwrap_err();
        assert_eq!(
            missing.features,
            ["AVX512F", "AVX512DQ", "CLFLUSHOPT", "CLWB", "AVX512CD", "AVX512BW", "AVX512VL"]
        );
        assert!(missing.to_string().starts_with("CPU model x86-64-v4 needs AVX512F, "));
    }

    #[test]
    fn a_guest_goes_on_only_where_all_is_that_it_was_shown() {
        let cpuid = |leaves: &[kvm_cpuid_entry2]| CpuId::from_entries(leaves).unwrap();
        let own = cpuid(&rich());
        let changed = |function: u32, register: usize, value: u32| {
            let mut leaves = rich();
            for leaf in leaves.iter_mut().filter(|leaf| (leaf.function, leaf.index) == (function, 0)) {
                *[&mut leaf.eax, &mut leaf.ebx, &mut leaf.ecx, &mut leaf.edx][register] = value;
            }
            cpuid(&leaves)
        };
        assert_eq!(check_fit(&own, &own), Ok(()));
        let fewer = changed(7, 1, 1 << 5);
        assert_eq!(check_fit(&fewer, &own), Ok(()), "a better processor will do");
        let why = check_fit(&own, &fewer).unwrap_err();
        assert!(why.contains("of EBX in leaf 0x7.0"), "{why}");
        let foreign = changed(0, 2, u32::from_le_bytes(*b"Else"));
        assert!(check_fit(&own, &foreign).unwrap_err().contains("vendor"));
        let [own, fewer, foreign] = [&own, &fewer, &foreign].map(Processor::of);
        assert!(own.carries(&own, Host) && own.carries(&fewer, X86_64V2) && !own.carries(&fewer, Host));
        assert!(!foreign.carries(&own, X86_64V2));
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for model in CpuModel::ALL {
            assert_eq!(model.name().parse(), Ok(model));
            assert_eq!(serde_json::to_string(&model).unwrap(), format!("\"{model}\""));
        }
        assert!("x86-64-v5".parse::<CpuModel>().is_err());
    }
}
