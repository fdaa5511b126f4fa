//! What a host's CPU has to have for a guest to go on there: every feature that the guest was shown.
//!
//! A guest looks at CPUID when it boots, and uses what it has seen from then on. A host may have more, but what it
//! lacks would be an undefined instruction some day. So the feature words of the CPUID that was shown are part of a
//! snapshot, and compared with what this host would show.

use cutover_snapshot::manifest::{CpuNeeds, CpuRegister, CpuWord};
use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use kvm_ioctls::Cap;

use crate::Error;
use crate::cpu::shown_here;
use crate::kvm;

use CpuRegister::{Eax, Ebx, Ecx, Edx};

/// Registers of CPUID that hold feature bits: leaf, subleaf, register (Intel SDM volume 2, CPUID; AMD APM volume 3,
/// appendix E; Documentation/virt/kvm/x86/cpuid.rst).
const FEATURE_WORDS: [(u32, u32, CpuRegister); 26] = [
    (0x1, 0, Ecx),
    (0x1, 0, Edx),
    (0x6, 0, Eax),
    (0x7, 0, Ebx),
    (0x7, 0, Ecx),
    (0x7, 0, Edx),
    (0x7, 1, Eax),
    (0x7, 1, Ebx),
    (0x7, 1, Ecx),
    (0x7, 1, Edx),
    (0x7, 2, Edx),
    // Components of the extended state that the guest can enable, and how it can be saved.
    (0xd, 0, Eax),
    (0xd, 0, Edx),
    (0xd, 1, Eax),
    (0xd, 1, Ecx),
    (0xd, 1, Edx),
    (0x1e, 1, Eax),
    (0x24, 0, Ebx),
    // KVM's own.
    (0x4000_0001, 0, Eax),
    (0x8000_0001, 0, Ecx),
    (0x8000_0001, 0, Edx),
    (0x8000_0007, 0, Ebx),
    (0x8000_0007, 0, Edx),
    (0x8000_0008, 0, Ebx),
    (0x8000_0021, 0, Eax),
    (0x8000_0021, 0, Ecx),
];

/// Most features that a message names.
const NAMED_MAX: usize = 32;

/// What a guest needs that was shown `cpuid`.
pub fn of(cpuid: &[kvm_cpuid_entry2]) -> CpuNeeds {
    let words = FEATURE_WORDS.iter().map(|&(leaf, subleaf, register)| CpuWord {
        leaf,
        subleaf,
        register,
        bits: word(cpuid, leaf, subleaf, register),
    });
    CpuNeeds {
        vendor: vendor(cpuid),
        features: words.filter(|word| word.bits != 0).collect(),
    }
}

/// Whether this host has what `needs` says.
///
/// # Errors
/// The CPU is another manufacturer's or lacks features, each of which is named; or KVM cannot be asked.
pub fn check(needs: &CpuNeeds) -> Result<(), Error> {
    let kvm = kvm::open()?;
    check_against(
        needs,
        &kvm::supported_cpuid(&kvm)?,
        kvm.check_extension(Cap::TscDeadlineTimer),
    )
}

/// Whether a host has what `needs` says whose KVM supports `supported`, and a local APIC with or without
/// `tsc_deadline`.
///
/// # Errors
/// As [`check`].
pub fn check_against(needs: &CpuNeeds, supported: &CpuId, tsc_deadline: bool) -> Result<(), Error> {
    compare(needs, shown_here(supported, tsc_deadline)?.as_slice())
}

/// Whether a host that shows its guests `cpuid` has what `needs` says.
fn compare(needs: &CpuNeeds, cpuid: &[kvm_cpuid_entry2]) -> Result<(), Error> {
    let vendor = vendor(cpuid);
    if needs.vendor != vendor {
        return Err(Error::CpuVendor {
            needed: needs.vendor.clone(),
            found: vendor,
        });
    }
    let missing: Vec<String> = needs
        .features
        .iter()
        .flat_map(|need| missing_of(need, word(cpuid, need.leaf, need.subleaf, need.register)))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut features = missing[..missing.len().min(NAMED_MAX)].join(", ");
    if missing.len() > NAMED_MAX {
        features += &format!(" and {} more", missing.len() - NAMED_MAX);
    }
    Err(Error::CpuFeatures { features })
}

/// The bits of `need` that `present` lacks, as the manufacturers' manuals write them.
fn missing_of(need: &CpuWord, present: u32) -> impl Iterator<Item = String> {
    let CpuWord {
        leaf,
        subleaf,
        register,
        bits,
    } = *need;
    let register = match register {
        Eax => "EAX",
        Ebx => "EBX",
        Ecx => "ECX",
        Edx => "EDX",
    };
    (0..u32::BITS)
        .filter(move |bit| bits & !present & 1 << bit != 0)
        .map(move |bit| format!("CPUID.(EAX={leaf:X}H,ECX={subleaf}):{register}[{bit}]"))
}

/// A register of CPUID's answer; zero where there is no such leaf.
fn word(cpuid: &[kvm_cpuid_entry2], leaf: u32, subleaf: u32, register: CpuRegister) -> u32 {
    let entry = cpuid
        .iter()
        .find(|entry| entry.function == leaf && entry.index == subleaf);
    entry.map_or(0, |entry| match register {
        Eax => entry.eax,
        Ebx => entry.ebx,
        Ecx => entry.ecx,
        Edx => entry.edx,
    })
}

/// The manufacturer's name: twelve characters in EBX, EDX and ECX of leaf 0.
fn vendor(cpuid: &[kvm_cpuid_entry2]) -> String {
    let bytes: Vec<u8> = [Ebx, Edx, Ecx]
        .into_iter()
        .flat_map(|register| word(cpuid, 0, 0, register).to_le_bytes())
        .collect();
    String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(words: &[(u32, u32, [u32; 4])]) -> Vec<kvm_cpuid_entry2> {
        let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
        let vendor = (0, 0, [0x20, word(b"Genu"), word(b"ntel"), word(b"ineI")]);
        [vendor]
            .iter()
            .chain(words)
            .map(|&(function, index, [eax, ebx, ecx, edx])| kvm_cpuid_entry2 {
                function,
                index,
                eax,
                ebx,
                ecx,
                edx,
                ..Default::default()
            })
            .collect()
    }

    #[test]
    fn a_host_with_all_the_guest_has_seen_and_more_will_do() {
        let needs = of(&host(&[(0x1, 0, [0, 0, 0b101, 0]), (0x7, 0, [0, 1 << 16, 0, 0])]));
        assert_eq!(needs.vendor, "GenuineIntel");
        assert_eq!(needs.features.len(), 2);
        compare(
            &needs,
            &host(&[(0x1, 0, [0, 0, 0b111, 1]), (0x7, 0, [2, 3 << 16, 0, 0])]),
        )
        .unwrap();
    }

    #[test]
    fn every_feature_that_is_missing_is_named() {
        let needs = of(&host(&[
            (0x1, 0, [0, 0, 0b110, 0]),
            (0x7, 0, [0, 1 << 16, 0, 0]),
            (0x8000_0001, 0, [0, 0, 0, 1 << 29]),
        ]));
        let error = compare(&needs, &host(&[(0x1, 0, [0, 0, 0b010, 0]), (0x8000_0001, 0, [0; 4])])).unwrap_err();
        let Error::CpuFeatures { features } = error else {
            panic!("{error}")
        };
        assert_eq!(
            features,
            "CPUID.(EAX=1H,ECX=0):ECX[2], CPUID.(EAX=7H,ECX=0):EBX[16], CPUID.(EAX=80000001H,ECX=0):EDX[29]"
        );
    }

    #[test]
    fn a_message_has_an_end_whatever_the_snapshot_says() {
        let word = CpuWord {
            leaf: 1,
            subleaf: 0,
            register: Eax,
            bits: u32::MAX,
        };
        let needs = CpuNeeds {
            vendor: "GenuineIntel".to_owned(),
            features: vec![word; 1000],
        };
        let error = compare(&needs, &host(&[])).unwrap_err().to_string();
        assert!(error.contains("and 31968 more"), "{error}");
    }

    #[test]
    fn a_cpu_of_another_manufacturer_is_refused() {
        let needs = CpuNeeds {
            vendor: "AuthenticAMD".to_owned(),
            features: Vec::new(),
        };
        assert!(matches!(compare(&needs, &host(&[])), Err(Error::CpuVendor { .. })));
    }
}
