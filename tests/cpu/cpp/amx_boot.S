// The first sector of a disk: loads those behind it, turns on 64-bit mode, the vector registers and the tiles, and goes
// on to `start`. SPDX-License-Identifier: Apache-2.0
        .section .boot, "awx"
        .code16
        xorw %ax, %ax
        movw %ax, %ds
        movw %ax, %es
        movw %ax, %ss
        movw $0x7C00, %sp
        movw $sectors, %si
        movb $0x42, %ah
        int $0x13                       // the disk is the one in %dl
        jc stop
        cli
        cld
        movw $0x1000, %di               // three tables of pages: the first 2 MiB, at their own addresses
        movw $0x3000 / 4, %cx
        xorl %eax, %eax
        rep stosl
        movl $0x2003, 0x1000
        movl $0x3003, 0x2000
        movl $0x83, 0x3000
        movl $0x40620, %eax             // PAE, OSFXSR, OSXMMEXCPT, OSXSAVE
        movl %eax, %cr4
        movl $0x1000, %eax
        movl %eax, %cr3
        movl $0xC0000080, %ecx          // EFER: LME
        rdmsr
        orl $0x100, %eax
        wrmsr
        lgdt table_at
        movl $0x80000003, %eax          // PG, MP, PE
        movl %eax, %cr0
        ljmp $8, $long
        .code64
long:   movl $16, %eax
        movw %ax, %ds
        movw %ax, %es
        movw %ax, %ss
        movl $0x80000, %esp
        xorl %ecx, %ecx
        xorl %edx, %edx
        movl $0x600E7, %eax             // x87, SSE, AVX, AVX-512, AMX
        xsetbv
        movl $start, %eax
        call *%rax
stop:   hlt
        jmp stop

        .balign 8
table:  .quad 0, 0x00209A0000000000, 0x0000920000000000
table_at:
        .word table_at - table - 1
        .long table
sectors:
        .byte 16, 0
        .word 127, 0, 0x7E0             // how many, to where
        .quad 1
        .org 510
        .word 0xAA55
