//! SMBIOS tables (DMTF DSP0134, version 3.0): who made the machine, and which one it is. Firmware takes them over from fw_cfg and puts them
//! where operating systems look.

use uuid::Uuid;

/// Name of the file with the entry point.
pub(super) const ANCHOR_FILE: &str = "etc/smbios/smbios-anchor";
/// Name of the file with the structures.
pub(super) const TABLES_FILE: &str = "etc/smbios/smbios-tables";

/// Length of the 64-bit entry point (5.2.2).
const ANCHOR_LEN: usize = 24;
const TYPE_SYSTEM: u8 = 1;
const TYPE_CHASSIS: u8 = 3;
const TYPE_END: u8 = 127;
/// "Power switch", for the wake-up type of the system (7.2.2).
const WAKE_UP_POWER_SWITCH: u8 = 6;
/// "Rack mount chassis" and "safe" (7.4.1, 7.4.2).
const CHASSIS_RACK: u8 = 0x17;
const STATE_SAFE: u8 = 3;
const SECURITY_NONE: u8 = 3;
const MANUFACTURER: &str = "HCI";
const PRODUCT: &str = "HCI Virtual Machine";

/// The two files.
pub(super) struct Tables {
    pub(super) anchor: Vec<u8>,
    pub(super) tables: Vec<u8>,
}

/// Tables of a machine with this identity.
pub(super) fn build(id: Uuid) -> Tables {
    let serial = id.to_string();
    let mut tables = Vec::new();
    // The first three fields of the UUID are little-endian (7.2.1).
    let mut system = vec![1, 2, 3, 4];
    system.extend(id.to_bytes_le());
    system.extend([WAKE_UP_POWER_SWITCH, 0, 0]);
    structure(&mut tables, TYPE_SYSTEM, 0x100, &system, &[MANUFACTURER, PRODUCT, "1", &serial]);
    let (state, no_strings) = ([STATE_SAFE, STATE_SAFE, STATE_SAFE, SECURITY_NONE], 0);
    let mut chassis = vec![1, CHASSIS_RACK, no_strings, no_strings, no_strings];
    chassis.extend(state);
    // OEM-defined, height, power cords, contained elements and their length, SKU number.
    chassis.extend([0, 0, 0, 0, 0, 0, 0, 0, no_strings]);
    structure(&mut tables, TYPE_CHASSIS, 0x300, &chassis, &[MANUFACTURER]);
    structure(&mut tables, TYPE_END, 0x7f00, &[], &[]);
    Tables { anchor: anchor(tables.len() as u32), tables }
}

/// Appends a structure: header, formatted area, strings (6.1).
fn structure(tables: &mut Vec<u8>, kind: u8, handle: u16, body: &[u8], strings: &[&str]) {
    tables.extend([kind, 4 + body.len() as u8]);
    tables.extend(handle.to_le_bytes());
    tables.extend(body);
    for string in strings {
        tables.extend(string.as_bytes());
        tables.push(0);
    }
    if strings.is_empty() {
        tables.push(0);
    }
    tables.push(0);
}

fn anchor(len: u32) -> Vec<u8> {
    let mut anchor = b"_SM3_".to_vec();
    // Checksum, length, version 3.0, documentation revision, revision of the entry point, reserved.
    anchor.extend([0, ANCHOR_LEN as u8, 3, 0, 0, 1, 0]);
    anchor.extend(len.to_le_bytes());
    // Where the structures are; the firmware says.
    anchor.extend([0; 8]);
    anchor[5] = anchor.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
    anchor
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_follow_each_other_to_the_end_and_name_the_machine() {
        let id = Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff);
        let Tables { anchor, tables } = build(id);
        assert_eq!((anchor.len(), &anchor[..5]), (ANCHOR_LEN, b"_SM3_".as_slice()));
        assert_eq!(anchor.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        assert_eq!(u32::from_le_bytes(anchor[12..16].try_into().unwrap()) as usize, tables.len());
        let mut rest = tables.as_slice();
        let mut kinds = Vec::new();
        while !rest.is_empty() {
            let len = rest[1] as usize;
            if rest[0] == TYPE_SYSTEM {
                assert_eq!(len, 27);
                assert_eq!(
                    rest[8..24],
                    [
                        0x33, 0x22, 0x11, 0, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd,
                        0xee, 0xff
                    ]
                );
            }
            kinds.push(rest[0]);
            let strings = rest[len..].windows(2).position(|pair| pair == [0, 0]).unwrap();
            rest = &rest[len + strings + 2..];
        }
        assert_eq!(kinds, [TYPE_SYSTEM, TYPE_CHASSIS, TYPE_END]);
        assert!(tables.windows(36).any(|text| text == b"00112233-4455-6677-8899-aabbccddeeff"));
    }
}
